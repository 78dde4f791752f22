"""Problems, errors, amplification, timing, records, plots, report and the command line."""
