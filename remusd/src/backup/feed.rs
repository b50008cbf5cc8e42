//! Feeds the receiver's pipe: bounded, in order, with a watermark of what the receiver has taken in.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::drill::snapshot::Snapshot;
use crate::ids::Epoch;
use crate::ops::Backoff;

/// Bytes that the pipe may hold: fewer switches between writer and receiver during the first copy.
const PIPE: i32 = 1 << 20;
/// The kernel has no event for "the reader has emptied the pipe", so a mark is awaited by looking, first often, then less.
const LOOK_FIRST: Duration = Duration::from_micros(200);
const LOOK_LAST: Duration = Duration::from_millis(5);

/// The writing end of a pipe that can tell what its reader has not read yet.
pub trait FeedPipe: AsyncWrite + Send + Sync + Unpin {
    /// Bytes in the pipe.
    ///
    /// # Errors
    /// What the system says.
    fn unread(&self) -> io::Result<u64>;
}

impl<T: AsyncWrite + AsFd + Send + Sync + Unpin> FeedPipe for T {
    fn unread(&self) -> io::Result<u64> {
        Ok(rustix::io::ioctl_fionread(self)?)
    }
}

/// Enlarges a pipe as far as the system allows.
pub(super) fn enlarge(pipe: &impl AsFd) {
    // A host with a lower pipe-max-size just switches more often.
    let _ = nix::fcntl::fcntl(pipe, nix::fcntl::FcntlArg::F_SETPIPE_SZ(PIPE));
}

/// What the feed tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FeedEvent {
    /// The receiver has read all of this epoch.
    Drained(Epoch),
    /// The receiver does not read any more.
    Failed(String),
}

/// A record that the receiver skips (libxc-migration-stream: `OPTIONAL` records that are not known are ignored). It reads no record
/// before it has done with the one before: once this is read, all before it is applied.
const BARRIER: u32 = crate::stream::libxc::kind::OPTIONAL | 0x7265_6d75;

enum Item {
    Bytes(Vec<Bytes>),
    /// Records that overwrite these pages.
    Pages(Vec<u64>, Vec<Bytes>),
    /// From here on what is overwritten is put aside first.
    Snapshot(Weak<Snapshot>, oneshot::Sender<()>),
    Mark(Epoch),
}

/// The queue in front of the receiver. Dropping it closes the pipe at once, whatever is queued.
#[derive(Debug)]
pub struct Feed {
    items: mpsc::UnboundedSender<Item>,
    queued: watch::Sender<usize>,
    task: JoinHandle<()>,
}

impl Feed {
    /// Starts feeding. Events go to `tell`, which must not block.
    pub fn start(pipe: Box<dyn FeedPipe>, tell: impl Fn(FeedEvent) + Send + Sync + 'static) -> Self {
        let (items, queue) = mpsc::unbounded_channel();
        let (queued, _) = watch::channel(0);
        let gauge = queued.clone();
        let task = tokio::spawn(async move {
            if let Err(error) = run(pipe, queue, &gauge, &tell).await {
                tell(FeedEvent::Failed(error.to_string()));
            }
        });
        Self { items, queued, task }
    }

    /// Queues bytes.
    pub fn bytes(&self, pieces: Vec<Bytes>) {
        self.queued.send_modify(|queued| *queued += size(&pieces));
        // The task ends only after it has told why.
        let _ = self.items.send(Item::Bytes(pieces));
    }

    /// Queues the records of these pages.
    pub(super) fn pages(&self, entries: Vec<u64>, pieces: Vec<Bytes>) {
        self.queued.send_modify(|queued| *queued += size(&pieces));
        let _ = self.items.send(Item::Pages(entries, pieces));
    }

    /// Has what later pages overwrite put aside for this snapshot, for as long as somebody else holds it. Answers when the receiver
    /// has applied all that was queued before and nothing more. Only at a record boundary.
    pub(super) fn snapshot(&self, snapshot: &Arc<Snapshot>) -> oneshot::Receiver<()> {
        let (tell, ready) = oneshot::channel();
        let _ = self.items.send(Item::Snapshot(Arc::downgrade(snapshot), tell));
        ready
    }

    /// Tells [`FeedEvent::Drained`] when all that was queued before has been read.
    pub fn mark(&self, epoch: Epoch) {
        let _ = self.items.send(Item::Mark(epoch));
    }

    /// Bytes queued and not yet written.
    #[must_use]
    pub fn queued(&self) -> usize {
        *self.queued.borrow()
    }

    /// Waits until less than `limit` bytes are queued. Cancel safe; waits for ever if the receiver has stopped reading.
    pub async fn room(&self, limit: usize) {
        let mut queued = self.queued.subscribe();
        let below = queued.wait_for(|queued| *queued < limit).await.is_ok();
        debug_assert!(below, "we hold the sender");
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn size(pieces: &[Bytes]) -> usize {
    pieces.iter().map(Bytes::len).sum()
}

async fn run(
    mut pipe: Box<dyn FeedPipe>,
    mut queue: mpsc::UnboundedReceiver<Item>,
    gauge: &watch::Sender<usize>,
    tell: &(impl Fn(FeedEvent) + Sync),
) -> io::Result<()> {
    let mut snapshot: Weak<Snapshot> = Weak::new();
    while let Some(item) = queue.recv().await {
        match item {
            Item::Bytes(pieces) => write(&mut *pipe, &pieces, gauge).await?,
            Item::Pages(entries, pieces) => {
                if let Some(snapshot) = Weak::upgrade(&snapshot) {
                    snapshot.preserve(&entries).await;
                }
                write(&mut *pipe, &pieces, gauge).await?;
            }
            Item::Snapshot(begun, tell) => {
                let mut barrier = BytesMut::new();
                crate::stream::libxc::put_record(&mut barrier, BARRIER, &[]);
                pipe.write_all(&barrier).await?;
                pipe.flush().await?;
                drained(&*pipe).await?;
                snapshot = begun;
                // It may have been given up meanwhile.
                let _ = tell.send(());
            }
            Item::Mark(epoch) => {
                drained(&*pipe).await?;
                tell(FeedEvent::Drained(epoch));
            }
        }
    }
    Ok(())
}

async fn write(pipe: &mut dyn FeedPipe, pieces: &[Bytes], gauge: &watch::Sender<usize>) -> io::Result<()> {
    for piece in pieces {
        pipe.write_all(piece).await?;
        gauge.send_modify(|queued| *queued -= piece.len());
    }
    pipe.flush().await
}

/// Waits until the receiver has read everything.
async fn drained(pipe: &dyn FeedPipe) -> io::Result<()> {
    let mut backoff = Backoff::endless(LOOK_FIRST, LOOK_LAST).map_err(io::Error::other)?;
    while pipe.unread()? > 0 {
        // Endless.
        let _ = backoff.wait().await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::unix::pipe;

    use super::*;

    fn start() -> (Feed, pipe::Receiver, mpsc::UnboundedReceiver<FeedEvent>) {
        let (sender, receiver) = pipe::pipe().unwrap();
        let (tell, told) = mpsc::unbounded_channel();
        let feed = Feed::start(Box::new(sender), move |event| {
            let _ = tell.send(event);
        });
        (feed, receiver, told)
    }

    #[tokio::test]
    async fn a_mark_is_told_only_when_the_reader_has_read_everything_before_it() {
        let (feed, mut reader, mut told) = start();
        feed.bytes(vec![Bytes::from_static(b"abc"), Bytes::from_static(b"def")]);
        feed.mark(Epoch(1));
        let mut half = [0; 4];
        reader.read_exact(&mut half).await.unwrap();
        let early = tokio::time::timeout(Duration::from_millis(50), told.recv()).await;
        assert!(early.is_err(), "two bytes are still in the pipe");
        reader.read_exact(&mut half[..2]).await.unwrap();
        assert_eq!(told.recv().await, Some(FeedEvent::Drained(Epoch(1))));
    }

    #[tokio::test]
    async fn room_is_there_when_the_reader_reads_and_a_dead_reader_is_told() {
        let (feed, mut reader, mut told) = start();
        let chunk = Bytes::from(vec![7; 1 << 20]);
        feed.bytes(vec![chunk.clone()]);
        feed.bytes(vec![chunk]);
        assert!(tokio::time::timeout(Duration::from_millis(50), feed.room(1 << 20)).await.is_err());
        let mut sink = vec![0; 1 << 20];
        reader.read_exact(&mut sink).await.unwrap();
        feed.room((1 << 20) + 1).await;
        drop(reader);
        assert!(matches!(told.recv().await, Some(FeedEvent::Failed(_))));
    }

    #[tokio::test]
    async fn dropping_the_feed_ends_the_pipe() {
        let (feed, mut reader, _told) = start();
        feed.bytes(vec![Bytes::from(vec![7; 1 << 20])]);
        feed.mark(Epoch(0));
        drop(feed);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).await.unwrap();
        assert!(all.len() < 1 << 20);
    }
}
