"""``python -m loopwright`` is the ``loopwright`` command."""

from loopwright.cli import main

raise SystemExit(main())
