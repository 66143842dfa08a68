"""The station: a service and a page that inspect, decide and teach. Needs the extra [station]."""
