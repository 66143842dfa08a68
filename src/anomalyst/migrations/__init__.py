"""Alembic revisions of the station's tables, run by `anomalyst.station.database`."""
