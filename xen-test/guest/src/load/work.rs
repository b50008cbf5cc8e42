//! Busy work: how much of the CPU is left to the guest's programs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::clock::monotonic_ns;
use crate::protocol::WorkInfo;

/// Steps in one unit: some 10-100 µs of integer arithmetic.
const STEPS: u64 = 20_000;

#[derive(Default)]
struct Run {
    stop: AtomicBool,
    units: AtomicU64,
}

/// Counts units of work done in a loop of its own; off until started.
#[derive(Default)]
pub struct Work {
    run: Mutex<Arc<Run>>,
    running: AtomicBool,
}

impl Work {
    /// Starts counting from 0.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn start(&self) -> std::io::Result<WorkInfo> {
        let mut slot = self.slot();
        slot.stop.store(true, Ordering::Relaxed);
        let run = Arc::new(Run::default());
        let theirs = Arc::clone(&run);
        thread::Builder::new().name("work".into()).spawn(move || {
            let mut x = 1;
            while !theirs.stop.load(Ordering::Relaxed) {
                for _ in 0..STEPS {
                    x = super::pattern::mix(std::hint::black_box(x));
                }
                theirs.units.fetch_add(1, Ordering::Relaxed);
            }
        })?;
        *slot = run;
        self.running.store(true, Ordering::Relaxed);
        drop(slot);
        Ok(self.read())
    }

    /// How far it is.
    pub fn read(&self) -> WorkInfo {
        WorkInfo {
            running: self.running.load(Ordering::Relaxed),
            units: self.slot().units.load(Ordering::Relaxed),
            t_ns: monotonic_ns(),
        }
    }

    /// Stops; the count stays readable.
    pub fn stop(&self) -> WorkInfo {
        self.slot().stop.store(true, Ordering::Relaxed);
        self.running.store(false, Ordering::Relaxed);
        self.read()
    }

    fn slot(&self) -> MutexGuard<'_, Arc<Run>> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
