"""The disk format: schema, shards, codecs, manifest, durable files, locations."""

__all__: list[str] = []
