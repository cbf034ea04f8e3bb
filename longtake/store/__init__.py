"""The latent store: what encoders made of a manifest's clips and captions, kept for all epochs."""

from longtake.store.assemble import failed_samples, make_index, manifest_facts
from longtake.store.board import Tally, remove_leftovers
from longtake.store.budget import Budget, Demand, demand_of, remove_shards, shares_kept
from longtake.store.catalog import Catalog, read_catalog
from longtake.store.claims import wait_for_claim
from longtake.store.cluster import Cluster, ClusterError
from longtake.store.encoders import (
    StoredTextEncoder,
    StoredVideoEncoder,
    check_encoders,
    stored_encoders,
)
from longtake.store.encoding import Encoding, Job
from longtake.store.forms import Form
from longtake.store.index import Index, is_store, read_index, write_index
from longtake.store.keys import Identity, file_keys
from longtake.store.plan import (
    Content,
    Group,
    WorkList,
    content_of,
    largest_size,
    missing_work,
)
from longtake.store.rates import Rates, agreed_rates, captions_to_time, group_text
from longtake.store.reader import EncodedBatch, StoreSource, open_source
from longtake.store.recipe import Recipe, make_recipe
from longtake.store.shards import shards_folder
from longtake.store.tensor_file import StoreError
from longtake.store.verify import Damage, find_damage, set_aside

__all__ = [
    "Budget",
    "Catalog",
    "Cluster",
    "ClusterError",
    "Content",
    "Damage",
    "Demand",
    "EncodedBatch",
    "Encoding",
    "Form",
    "Group",
    "Identity",
    "Index",
    "Job",
    "Rates",
    "Recipe",
    "StoreError",
    "StoreSource",
    "StoredTextEncoder",
    "StoredVideoEncoder",
    "Tally",
    "WorkList",
    "agreed_rates",
    "captions_to_time",
    "check_encoders",
    "content_of",
    "demand_of",
    "failed_samples",
    "file_keys",
    "find_damage",
    "group_text",
    "is_store",
    "largest_size",
    "make_index",
    "make_recipe",
    "manifest_facts",
    "missing_work",
    "open_source",
    "read_catalog",
    "read_index",
    "remove_leftovers",
    "remove_shards",
    "set_aside",
    "shards_folder",
    "shares_kept",
    "stored_encoders",
    "wait_for_claim",
    "write_index",
]
