//! A network namespace that lives and dies with this process.

use std::fs::File;
use std::sync::mpsc::{Sender, channel};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::gettid;

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace without a name: it is gone, with its bridges and taps, as soon as the last
/// process in it is. One thread of ours stays inside for as long as this value lives; children that
/// must die with us are started on that thread.
#[derive(Debug)]
pub struct NetNs {
    jobs: Option<Sender<Job>>,
    thread: i32,
    handle: Option<std::thread::JoinHandle<()>>,
}

impl NetNs {
    /// Makes a new, empty namespace (its `lo` is up).
    pub fn new() -> Result<Self> {
        let (jobs, inbox) = channel::<Job>();
        let (started, start) = channel();
        let handle = std::thread::Builder::new().name("netns".into()).spawn(move || {
            let result = unshare(CloneFlags::CLONE_NEWNET);
            let failed = result.is_err();
            let _ = started.send(result.map(|()| gettid().as_raw()));
            if !failed {
                for job in inbox {
                    job();
                }
            }
        })?;
        let thread = start
            .recv()
            .context("the namespace thread died")?
            .context("cannot make a network namespace (CONFIG_NET_NS, root needed)")?;
        Ok(Self { jobs: Some(jobs), thread, handle: Some(handle) })
    }

    /// Kernel id of the thread inside: `/proc/PID/task/THREAD/ns/net` is the namespace.
    pub fn thread(&self) -> i32 {
        self.thread
    }

    /// Runs a short closure on the thread inside and returns what it gives. Processes it starts
    /// are in the namespace, and (if made by [`crate::run::Child`]) die with this value.
    pub fn call<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (sender, answer) = channel();
        let job: Job = Box::new(move || {
            let _ = sender.send(job());
        });
        self.jobs
            .as_ref()
            .and_then(|jobs| jobs.send(job).ok())
            .ok_or_else(|| anyhow!("the namespace thread is gone"))?;
        answer.recv().context("the namespace thread panicked")
    }

    /// Runs a closure inside the namespace on a thread of its own; it may take its time. The
    /// thread's result is an error if it could not enter.
    pub fn spawn<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<std::thread::JoinHandle<Result<T>>> {
        let file = self.open()?;
        let body = move || {
            setns(&file, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")?;
            Ok(job())
        };
        Ok(std::thread::Builder::new().name("in-netns".into()).spawn(body)?)
    }

    /// The namespace as an open file, for `setns`.
    pub fn open(&self) -> Result<File> {
        let pid = std::process::id();
        File::open(format!("/proc/{pid}/task/{}/ns/net", self.thread)).context("the namespace thread is gone")
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(handle) = self.handle.take() {
            let _ = handle.join();
        }
    }
}

/// Moves the calling thread into the network namespace of a thread of another process.
pub fn enter_netns_of(pid: i32, thread: i32) -> Result<()> {
    let path = format!("/proc/{pid}/task/{thread}/ns/net");
    let file = File::open(&path).with_context(|| format!("cannot open {path}"))?;
    setns(&file, CloneFlags::CLONE_NEWNET).context("cannot enter the run's network namespace")
}
