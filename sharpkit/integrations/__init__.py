"""Other people's trainers: thin adapters, each imported when it is used."""
