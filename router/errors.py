"""What the router adds to the errors of the parameter server."""

from ps.errors import EmbringError, NotApplied, RequestError


class UnknownModel(RequestError):
    """No such model, or no such version of it: the message names it and what there is."""

    code = "unknown_model"


class DeadlineExceeded(NotApplied):
    """The request's time was over before its scores were there; the message names the stage."""

    code = "deadline"


class NonFiniteScore(EmbringError):
    """The model gave a row NaN or infinity: its head or its tables are broken, not the request."""

    code = "non_finite"
