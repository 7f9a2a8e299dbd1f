"""Every exception of the project.

KVShareError
├── ConfigError        a setting is wrong; says the value, the accepted ones and the remedy
├── UnsupportedError   the server, model or SGLang version cannot be served; refused at start-up by name
├── SetupError         something that must be installed or prepared first is missing
└── PlanError          a record broke one of its own invariants (a bug in this project); also a `radix_ext` record's
"""


class KVShareError(Exception):
    """Base of all errors raised by kvshare-sched."""


class ConfigError(KVShareError, ValueError):
    """A configuration value that is not accepted; the message names the value, the choices and the remedy."""


class UnsupportedError(KVShareError):
    """A combination of server, model and version that kvshare-sched refuses to serve."""


class SetupError(KVShareError):
    """A prerequisite (package, model, tool) is missing."""


class PlanError(KVShareError, AssertionError):
    """A record that contradicts itself. At run time it means ordinary prefill for that request."""
