def includeme(config):
    config.add_route("letters", "/letters")
    config.add_route("letter", "/letters/{id}")
