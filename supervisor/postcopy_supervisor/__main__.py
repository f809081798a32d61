"""``python -m postcopy_supervisor``: the program behind ``postcopy serve``."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec

from postcopy_kernel.program_start import prepare
from postcopy_kernel.userfaultfd import UserfaultfdUnavailable
from postcopy_protocol.errors import BadInput, PostcopyError


def main() -> int:
    """Returns the exit status: 0 ended in order, 1 failed, 2 usage."""
    from .settings import parse

    prepare()
    try:
        settings = parse(sys.argv[1:])
    except BadInput as error:
        print(f"postcopy serve: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=settings.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    if find_spec("prctl") is None:  # workers drop their rights with it
        print(
            "postcopy serve: python-prctl is missing; install the supervisor: pip install 'postcopy[supervisor]' "
            "(needs a C compiler and libcap-dev)",
            file=sys.stderr,
        )
        return 1
    from .assembly import serve

    try:
        serve(settings)
    except (PostcopyError, UserfaultfdUnavailable) as error:
        print(f"postcopy serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
