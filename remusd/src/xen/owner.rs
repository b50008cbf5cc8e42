//! A thread that owns an interface which must not change threads, and does calls on it in order.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};

use tokio::sync::oneshot;

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

/// A hand on the thread. The thread ends when the last hand is dropped.
pub(super) struct Owner<S> {
    jobs: Sender<Job<S>>,
}

/// The call was not done: it panicked, or the thread is gone.
#[derive(Debug)]
pub(super) struct Lost;

impl<S: 'static> Owner<S> {
    /// Starts the thread; blocks until `open` has run on it, and returns its failure.
    pub(super) fn start<E, F>(name: &str, open: F, lost: impl Fn(String) -> E) -> Result<Self, E>
    where
        E: Send + 'static,
        F: FnOnce() -> Result<S, E> + Send + 'static,
    {
        let (jobs, queue) = channel::<Job<S>>();
        let (opened_tx, opened_rx) = channel();
        std::thread::Builder::new()
            .name(name.into())
            .spawn(move || match open() {
                Ok(mut interface) => {
                    let _ = opened_tx.send(Ok(()));
                    for job in queue {
                        // A panicking call costs its caller the answer, not everybody the interface.
                        let _ = catch_unwind(AssertUnwindSafe(|| job(&mut interface)));
                    }
                }
                Err(error) => {
                    let _ = opened_tx.send(Err(error));
                }
            })
            .map_err(|error| lost(error.to_string()))?;
        opened_rx.recv().map_err(|_| lost("its thread died".into()))??;
        Ok(Self { jobs })
    }

    /// Does `call` on the thread. If the future is dropped the call is done all the same.
    pub(super) async fn call<R, F>(&self, call: F) -> Result<R, Lost>
    where
        R: Send + 'static,
        F: FnOnce(&mut S) -> R + Send + 'static,
    {
        let (answer_tx, answer_rx) = oneshot::channel();
        self.jobs
            .send(Box::new(move |interface| {
                let _ = answer_tx.send(call(interface));
            }))
            .map_err(|_| Lost)?;
        answer_rx.await.map_err(|_| Lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn calls_run_in_order_and_outlive_a_panic() {
        let owner = Owner::start("test", || Ok::<_, String>(Vec::new()), |lost| lost).unwrap();
        assert_eq!(owner.call(|list| list.push(1)).await.ok(), Some(()));
        assert!(owner.call(|_| panic!("on purpose")).await.is_err());
        assert_eq!(
            owner
                .call(|list| {
                    list.push(2);
                    list.clone()
                })
                .await
                .ok(),
            Some(vec![1, 2])
        );
    }

    #[tokio::test]
    async fn a_failed_open_is_returned() {
        let failed = Owner::<()>::start("test", || Err("no".to_owned()), |lost| lost);
        assert_eq!(failed.err().as_deref(), Some("no"));
    }
}
