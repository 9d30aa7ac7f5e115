"""The report of a run folder: `report.json` with every figure, `report.html` that needs no other file and no network."""
