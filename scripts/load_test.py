#!/usr/bin/env python
"""`kvshare bench` for a checkout: python scripts/load_test.py --url http://127.0.0.1:30000 --traces rag --rate 2"""

import sys

from kvshare_sched.tools.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
