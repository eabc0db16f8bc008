import multiprocessing
import sys
import time


def job(body):
    return len(body)


with multiprocessing.Pool(int(sys.argv[1])) as pool:
    pool.map(job, [b"job"] * 1000, chunksize=1)
    for line in sys.stdin:
        kind, jobs = line.split()
        bodies = [b"job"] * int(jobs)
        begin = time.perf_counter()
        if kind == "one":
            for body in bodies:
                assert pool.apply(job, (body,)) == 3
        else:
            for answer in pool.imap_unordered(job, bodies):
                assert answer == 3
        print(time.perf_counter() - begin, flush=True)
    pool.terminate()
