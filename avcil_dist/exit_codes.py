"""Exit codes of the commands and of the processes that they start."""

USER_ERROR = 2  # one line on stderr says what was wrong; also click's code for wrong usage
PARTIAL = 3  # some inputs were left out, each named on stderr; the results of the others are complete
REQUEUE = 75  # sysexits' EX_TEMPFAIL: the same job may succeed when it is started again
INTERRUPTED = 130  # 128 + SIGINT
STOPPED = 143  # 128 + SIGTERM: stopped on request, with a snapshot committed
