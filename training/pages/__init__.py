"""The parts of an HTML page: escaped tables, pictures, histograms. Imports nothing heavy."""
