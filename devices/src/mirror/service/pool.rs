//! Threads that wait for disks.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// All memory is locked, so a large stack would cost its whole size, in bytes.
const STACK: usize = 256 * 1024;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    jobs: Mutex<(VecDeque<Job>, bool)>,
    more: Condvar,
}

/// A fixed number of threads that do jobs in the order in which they were given, each as soon as one is free.
#[derive(Clone)]
pub(super) struct Pool {
    queue: Arc<Queue>,
    _threads: Arc<Ending>,
}

/// Lets the threads end after the last job once nobody can give them more.
struct Ending(Arc<Queue>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.jobs.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.0.more.notify_all();
    }
}

impl Pool {
    pub(super) fn new(threads: usize) -> std::io::Result<Self> {
        let queue = Arc::new(Queue::default());
        for _ in 0..threads {
            let queue = queue.clone();
            std::thread::Builder::new().name("disk".into()).stack_size(STACK).spawn(move || {
                loop {
                    let mut jobs = queue.jobs.lock().unwrap_or_else(PoisonError::into_inner);
                    let job = loop {
                        if let Some(job) = jobs.0.pop_front() {
                            break job;
                        }
                        if jobs.1 {
                            return;
                        }
                        jobs = queue.more.wait(jobs).unwrap_or_else(PoisonError::into_inner);
                    };
                    drop(jobs);
                    job();
                }
            })?;
        }
        Ok(Self { _threads: Arc::new(Ending(queue.clone())), queue })
    }

    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        self.queue.jobs.lock().unwrap_or_else(PoisonError::into_inner).0.push_back(Box::new(job));
        self.queue.more.notify_one();
    }

    /// Does all of them, and returns when all are done, with their results in order. Not from a job.
    pub(super) fn run_all<T: Send + 'static>(&self, jobs: Vec<impl FnOnce() -> T + Send + 'static>) -> Vec<T> {
        let (tell, told) = std::sync::mpsc::channel();
        let count = jobs.len();
        for (at, job) in jobs.into_iter().enumerate() {
            let tell = tell.clone();
            self.run(move || drop(tell.send((at, job()))));
        }
        let mut results: Vec<_> = told.into_iter().take(count).collect();
        results.sort_by_key(|(at, _)| *at);
        results.into_iter().map(|(_, result)| result).collect()
    }
}
