"""What can a program ask of edgeft? Each stage as a function that does nothing twice and gives what it wrote.

    plan = edgeft.plan(model="folder", data="rows.jsonl", profile="t4", rank=16)   # print(plan) is the table
    trained = edgeft.train(plan, "build/t4/train")
    merged = edgeft.merge(trained, wise_alpha=0.6)
    bundle = edgeft.export(merged, target="ort-int4", device="raspberrypi5-8gb")

A result is the stage's JSON document, knows its folder and shows itself as the command line would. Where a result is
taken, its folder or file does too. `progress` and `say` get what the command line prints to stderr; errors are
edgeft.errors.EdgeftError.
"""
