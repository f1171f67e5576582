"""Exit codes of the commands and of the processes that they start."""

USER_ERROR = 2  # one line on stderr says what was wrong; also click's code for wrong usage
REQUEUE = 75  # sysexits' EX_TEMPFAIL: the same job may succeed when it is started again
INTERRUPTED = 130  # 128 + SIGINT
STOPPED = 143  # 128 + SIGTERM: stopped on request, with a snapshot committed
