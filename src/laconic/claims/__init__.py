"""The promises of the papers, runnable: `claims/<family>/<method>.py` holds the CLAIMS of that method; `laconic verify` runs them."""
