//! The word that output is held, as an event: who holds it tells, who decides when the epoch ends listens.
//!
//! It is a hint and nothing depends on it but latency. It may come for output that is gone again, or twice; it is never missing for
//! output that arrives after the epoch before was closed.

use tokio::sync::watch;

/// Makes both ends.
#[must_use]
pub fn output_signal() -> (OutputTeller, OutputWatch) {
    let (teller, watch) = watch::channel(());
    (OutputTeller(teller), OutputWatch(watch))
}

/// The end of those who hold output.
#[derive(Clone, Debug)]
pub struct OutputTeller(watch::Sender<()>);

impl OutputTeller {
    /// Output of the epoch under way is held. Never blocks.
    pub fn tell(&self) {
        self.0.send_replace(());
    }
}

/// The end of whoever decides when an epoch is over.
#[derive(Debug)]
pub struct OutputWatch(watch::Receiver<()>);

impl OutputWatch {
    /// What was told so far belongs to the epoch that is about to be closed. Call it before the devices close the epoch: what is told
    /// while they do may belong to the next one.
    pub fn close_epoch(&mut self) {
        self.0.mark_unchanged();
    }

    /// Waits until output is held that was not waited for yet. Cancel-safe. Waits for ever when nobody is left who could tell.
    pub async fn held(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn it_is_told_once_and_not_for_an_epoch_that_is_closed() {
        let (teller, mut watch) = output_signal();
        assert!(watch.held().now_or_never().is_none());
        teller.tell();
        teller.tell();
        assert!(watch.held().now_or_never().is_some());
        assert!(watch.held().now_or_never().is_none(), "told once");
        teller.tell();
        watch.close_epoch();
        assert!(watch.held().now_or_never().is_none(), "that was the epoch before");
        teller.clone().tell();
        drop(teller);
        assert!(watch.held().now_or_never().is_some(), "the last word of a teller that is gone");
        assert!(watch.held().now_or_never().is_none());
    }
}
