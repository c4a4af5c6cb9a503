"""The inference router: feature preparation, micro-batching, one pull for all tables, the dense head, scores.

`router.pipeline.Router` is its heart and callable in process; `router.features` prepares features in training and in
serving alike; `router.server` puts both front doors (Open Inference Protocol over gRPC and HTTP) before it.
"""
