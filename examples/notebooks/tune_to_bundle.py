# %% [markdown]
# # From a base model to a bundle that is proven
#
# A model of 5.8M parameters learns to sort Debian packages into sections, on a CPU, in a minute or two. The same lines
# take a model of 8B to a Raspberry Pi 5. `pip install "edgeft[export]"` is enough.

# %%
import edgeft

folder = edgeft.example("edgeft-example")

# %% [markdown]
# The plan: 60 steps, to have an answer soon. Without `max_steps` it is three passes over 6,000 rows.

# %%
rows = {role: str(folder / f"{name}.jsonl") for role, name in (("data", "train"), ("valid", "valid"))}
plan = edgeft.plan(model=str(folder / "model"), **rows, profile="cpu", max_steps=60, eval_rows=100,
                   out="edgeft-notebook/plan.json")  # fmt: skip
plan

# %% [markdown]
# A stage that has run is read, not run again: these cells can be repeated, and go on after the kernel was stopped.

# %%
trained = edgeft.train(plan)
trained

# %%
merged = edgeft.merge(trained)
bundle = edgeft.export(merged, target="ort-int4")
bundle

# %% [markdown]
# The bundle answers by the runner that goes to the device with it.

# %%
print(edgeft.run(bundle, "Package: python3-numpy\nSection:", max_tokens=4))

# %% [markdown]
# How good is it on rows of your own? Base, merged checkpoint and bundle on the same rows, with the 95% intervals of
# their differences.

# %%
import itertools

test = "edgeft-notebook/test.jsonl"
with open(folder / "test.jsonl", encoding="utf-8") as lines, open(test, "w", encoding="utf-8") as few:
    few.writelines(itertools.islice(lines, 60))
scores = edgeft.evaluate(folder / "model", merged, bundle, data=test)
scores
