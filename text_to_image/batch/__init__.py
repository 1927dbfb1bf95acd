"""Jobs: a list of prompts to ranked and diffused images, on one machine or several, resumable and exactly once.

settings.py   what a job is told
prompts.py    rows of a list: .txt, .csv, .jsonl, .parquet, WebDataset shards; local or an fsspec address
plan.py       the rows that can be used, and those set aside; prompts cut into units
tasks.py      units cut into blocks, the work of a stage; what goes to a worker and comes back
stages.py     sample, score, diffuse, pack: what a worker does with the models; prune.py, what is not drawn to the end
executor.py   where tasks run: the interface; local.py, processes on this machine; ray_executor.py, a Ray cluster
driver.py     the job: which task is next, what is tried again, narrowed or set aside
folder.py     the job's folder: job.json, what is done, commits; outputs.py, the files of a unit
manifest.py   the manifest of all images; status.py and report.py, what can be seen of a job
"""
