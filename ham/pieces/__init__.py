"""One experiment in several pieces: what each machine finished, carried home and put together."""
