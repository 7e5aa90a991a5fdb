# prepare cache with Apache Beam on Dataflow. Nothing is sent: a person runs these commands.
# Starts: 10 machines n2-standard-8 (80 cores) with 50 GB each, in us-central1 of mine, with the image host/espalier:1; the driver on this machine.
# Reads and writes: gs://bucket/dataflow, gs://bucket/cache
# Estimate: 1,000,000,000,000 tokens at 250,000 a second for each core (tokens_per_second, yours) are 1,111.1 core hours: 13.89 hours of 80 cores, if all are busy.
# Not in it: the time in which machines start and wait for the last shards, shuffles, disks, requests and traffic.
# Cost: 277.78, in the currency of your price_per_core_hour = 0.25.

# 1. Build the image of the workers, and send it.
docker build --target=beam --tag=host/espalier:1 .
docker push host/espalier:1

# 2. Start, from the same commit (this is where costs begin); it waits until all is done.
ESPALIER_CACHE=gs://bucket/cache .venv-beam/bin/python -m espalier.launch.prepare cache --gin.MIXTURE_OR_TASK_NAME=text --beam_pipeline_options=--runner=DataflowRunner,--project=mine,--region=us-central1,--job_name=prepare-DIGEST,--staging_location=gs://bucket/dataflow/staging,--temp_location=gs://bucket/dataflow/temp,--sdk_container_image=host/espalier:1,--worker_machine_type=n2-standard-8,--num_workers=10,--max_num_workers=10,--disk_size_gb=50,--number_of_worker_harness_threads=1

# 3. Watch, in another terminal.
gcloud dataflow jobs list --project=mine --region=us-central1 --status=active --filter=name=prepare-DIGEST

# 4. Stop (this is where costs end). The same start goes on later: finished shards stay.
gcloud dataflow jobs cancel --project=mine --region=us-central1 $(gcloud dataflow jobs list --project=mine --region=us-central1 --status=active --filter=name=prepare-DIGEST --format='value(id)')
