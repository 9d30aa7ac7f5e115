"""Quality filters. A new one is a class like `base.Filter`, of any package, named by its dotted path."""
