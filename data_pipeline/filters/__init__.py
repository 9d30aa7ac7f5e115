"""Quality filters. A new one is a class with `name`, `unit`, `score`, entered in `base.FILTERS`."""
