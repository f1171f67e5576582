"""Outcomes of a delivery that failed, as the sender distinguishes them. No server library is imported here."""


class UnavailableError(Exception):
    """The server does not answer, or cannot take the event now."""


class RejectedError(Exception):
    """The server answers, and will never take this event."""


class RefusedError(Exception):
    """The server takes nothing of this stream until the user acts; the text states the cause and what to do."""


class RunDeletedError(Exception):
    """A run that the server had was deleted there."""
