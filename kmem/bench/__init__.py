"""End-to-end comparisons with named peers; both sides are measured in one run."""
