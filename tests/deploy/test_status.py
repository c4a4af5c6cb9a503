"""What `status` says of the controller's checkpoints."""

from deploy.cli_status import _checkpoint

TOLD = {"directory": "ck", "every_s": 60.0, "doing": None, "last": {}, "error": ""}


def line(**told: object) -> str:
    return _checkpoint({"time": 100.0, "checkpoint": {**TOLD, **told}})


def test_checkpoints_are_told_of_where_the_controller_makes_or_reads_some() -> None:
    assert line(directory="") == ""
    assert line(every_s=0.0) == ""  # others may save into the folder: nothing is known of that
    assert line() == "checkpoints in ck: the controller has saved none of this cluster yet"
    last = {"save": {"at": 90.0, "name": "a", "rows": 1, "bytes": 2}}
    assert line(last=last) == "checkpoints in ck: saved a 10 s ago"
    assert line(every_s=0.0, doing="restore", error="save: no room") == (
        "checkpoints in ck: a restore is under way; the last one failed: save: no room"
    )
