"""How tokens attend to each other: exactly at less cost, or to fewer of them."""
