"""The tree of errors that SwarmX raises; expected outcomes (refusals, losses) are values, not errors."""


class SwarmXError(Exception):
    """What happened with which value, what was expected, what to do: the message says all three."""


class ConfigError(SwarmXError):
    """A setting, flag or file is unknown or out of range."""


class WorkflowError(SwarmXError):
    """A workflow definition cannot be accepted or a template in it cannot be evaluated.

    `where` names the node or field, so that a client can point at it.
    """

    def __init__(self, message: str, *, where: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.where = where
        self.detail = message


class NotFound(SwarmXError):
    """An id is unknown to this server, or belongs to another tenant."""


class Unauthorized(SwarmXError):
    """No token, or one that this server does not know."""


class Forbidden(SwarmXError):
    """The token is known but its role does not allow the request."""


class Refused(SwarmXError):
    """The guard, or the state of things, does not allow a control action. `rule` names what decided."""

    def __init__(self, message: str, *, rule: str) -> None:
        super().__init__(message)
        self.rule = rule


class JournalError(SwarmXError):
    """A journal cannot be read, or its decisions do not reproduce."""


class Unavailable(SwarmXError):
    """The server cannot do this now: it is stopping, or a file of its own is damaged."""


class StoreError(SwarmXError):
    """The database refused a write or holds a newer schema than this version knows."""


class KeyReused(SwarmXError):
    """An idempotency key came again with another request than its first one."""


class Outdated(SwarmXError):
    """What the client looked at before it asked for a change is not as it was any more."""


class ReplicaError(SwarmXError):
    """A replica did not start, hung, closed the connection or answered outside its protocol."""


class PredictorError(SwarmXError):
    """Weights, a feature spec or training data cannot be used: damaged, tampered with, or made for something else."""
