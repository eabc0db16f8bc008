import sys

from celery import Celery

address, prefix, act = sys.argv[1:4]
app = Celery("tasks", broker=address)
app.conf.update(
    broker_transport_options={"global_keyprefix": prefix},
    # As a sentinel does: the ack comes after the job.
    task_acks_late=True,
    task_ignore_result=True,
    task_serializer="json",
)


@app.task(name="job")
def job(body):
    return len(body)


if act == "publish":
    body, jobs = sys.argv[4:]
    with app.producer_pool.acquire(block=True) as producer:
        for _ in range(int(jobs)):
            job.apply_async((body,), producer=producer)
else:
    processes, each = sys.argv[4:]
    app.conf.worker_prefetch_multiplier = int(each)
    app.worker_main(
        ["worker", "--pool", "prefork", "--concurrency", processes, "--loglevel", "ERROR"]
        + ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    )
