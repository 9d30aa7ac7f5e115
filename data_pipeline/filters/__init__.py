"""Quality filters. A new one is a class with `name`, `unit` and `score`, entered in `base.FILTERS`."""
