"""The embedded default: real public-domain pictures and CC0 sounds composed into scenes with exact truth."""
