"""Exercise 1: boolean indexing, on the left of an assignment, fills row by row as well."""


def splice(embeds, is_image, features):
    embeds = embeds.clone()
    embeds[is_image] = features.flatten(0, 1).to(embeds.dtype)
    return embeds
