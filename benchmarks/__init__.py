"""Measurements of embring beside its peers: both sides in one run, interleaved, their results compared.

workloads (what is asked), implementations (who answers; equality tests read the same registry), measure (rounds,
medians, spreads), suites (what `embring bench` runs), peers (what embring is compared with).
"""
