"""The programs that call us. One file per host: its calls, in its spelling, turned into requests to the core."""
