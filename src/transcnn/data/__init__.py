"""What is read, and how it becomes batches.

    images, rng      one image file; random numbers that depend on (seed, epoch, index) alone
    sources/         where labelled images come from: folders, tars, Parquet, shards, URLs, named data sets
    transforms/      geometry, augmentation, normalisation
    sets/            datasets and their splits, one module a task
    loading/         samplers, loaders, the data module
    packing          ``transcnn pack``

Each imports only those above it.
"""
