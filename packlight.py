"""The command `packlight`, also as `python -m packlight`: what is imported first, so that Ctrl-C is one line at any moment."""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130  # 128 and the number of the signal, as shells have it
SAID = b"error: interrupted: found Ctrl-C; run it again\n"


def main() -> None:
    """Run the command line; see runtime.cli."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background, which Ctrl-C is not for
        from runtime import cli

        return cli.main()
    signal.signal(signal.SIGINT, _stop)
    from runtime import cli  # a quarter of a second, in which a library would make another error of KeyboardInterrupt

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return cli.main()
    except KeyboardInterrupt:
        _stop()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # said already; Python would end by the signal where it came within an exec()
            sys.stdout.flush()
            os._exit(INTERRUPTED)
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the status is known


def _stop(*told: object) -> None:
    """End at once: nothing is open yet, or everything is closed."""
    os.write(sys.stderr.fileno(), SAID)
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
