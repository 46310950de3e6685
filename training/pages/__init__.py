"""The parts of an HTML page: escaped tables, pictures, videos, charts. Imports nothing heavy."""
