"""Other people's trainers and loggers: thin adapters, each imported when it is used."""

from sharpkit.integrations import sinks as sinks
