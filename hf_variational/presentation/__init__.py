"""What a person sees: tokens coloured by uncertainty in the terminal, a page to hover over, plots."""
