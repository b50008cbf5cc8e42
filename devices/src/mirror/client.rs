//! A disk service as the daemon sees it: requests over its control socket, without blocking.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::service::{DiskEvent, Request, Response, Status};

/// Where disk services have their sockets, unless something else is configured.
pub const RUN: &str = "/run/remus/disk";
/// Where the links to their block devices are: `phy:/dev/remus/NAME`.
pub const LINKS: &str = "/dev/remus";

/// For requests that only touch the service's memory.
const QUICK: Duration = Duration::from_secs(2);
/// For requests that write metadata, wait for threads or talk to the kernel.
const SLOW: Duration = Duration::from_secs(60);

/// A disk service did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It does not run, or died.
    #[error("the disk service of {disk} cannot be reached ({source}): systemctl status remus-disk@{disk}")]
    Unreachable {
        /// Which disk.
        disk: String,
        /// Why.
        source: std::io::Error,
    },
    /// It did not answer. What it was asked may still happen.
    #[error("the disk service of {disk} did not answer {doing} within {after:?}")]
    Timeout {
        /// Which disk.
        disk: String,
        /// The request.
        doing: &'static str,
        /// How long.
        after: Duration,
    },
    /// It said no.
    #[error("disk {disk}: {why}")]
    Refused {
        /// Which disk.
        disk: String,
        /// Its words.
        why: String,
    },
}

impl ClientError {
    /// Whether the service was there and is not now, or did not answer: what it has open it opens again when it is restarted. A service
    /// that was never started in this boot has no socket.
    #[must_use]
    pub fn may_come_back(&self) -> bool {
        match self {
            Self::Unreachable { source, .. } => source.kind() != std::io::ErrorKind::NotFound,
            Self::Timeout { .. } => true,
            Self::Refused { .. } => false,
        }
    }
}

/// What closed an epoch of a disk. The backup's service compares the same numbers by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed {
    /// The epoch's last batch.
    pub batch: u64,
    /// Records in that batch.
    pub records: u64,
    /// Bytes in that batch.
    pub bytes: u64,
}

/// A connection to one disk's service. One request at a time; after an error the next call connects anew.
#[derive(Debug)]
pub struct DiskClient {
    disk: String,
    socket: PathBuf,
    stream: Option<BufReader<UnixStream>>,
}

impl DiskClient {
    /// For the disk `disk`, whose service has its sockets in `run`. Connects with the first request.
    #[must_use]
    pub fn new(run: &Path, disk: &str) -> Self {
        Self { disk: disk.to_owned(), socket: run.join(format!("{disk}.ctl")), stream: None }
    }

    /// The disk's name.
    #[must_use]
    pub fn disk(&self) -> &str {
        &self.disk
    }

    async fn exchange(&mut self, request: &Request) -> std::io::Result<Response> {
        // Taken out: whatever is interrupted here leaves no connection with an answer that belongs to nobody.
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => BufReader::new(UnixStream::connect(&self.socket).await?),
        };
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let mut answer = String::new();
        if stream.read_line(&mut answer).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        self.stream = Some(stream);
        Ok(serde_json::from_str(&answer)?)
    }

    /// Sends a request.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn call<T: DeserializeOwned>(
        &mut self,
        request: &Request,
        doing: &'static str,
        within: Duration,
    ) -> Result<T, ClientError> {
        let unreachable = |disk: &str, source| ClientError::Unreachable { disk: disk.to_owned(), source };
        let answer = match timeout(within, self.exchange(request)).await {
            Err(_) => return Err(ClientError::Timeout { disk: self.disk.clone(), doing, after: within }),
            Ok(answer) => answer.map_err(|source| unreachable(&self.disk, source))?,
        };
        match answer {
            Response::Ok(value) => {
                serde_json::from_value(value).map_err(|e| unreachable(&self.disk, std::io::Error::other(e)))
            }
            Response::Error(why) => Err(ClientError::Refused { disk: self.disk.clone(), why }),
        }
    }

    /// How it is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn status(&mut self) -> Result<Status, ClientError> {
        self.call(&Request::Status {}, "status", QUICK).await
    }

    /// Primary: from the running epoch on the copy applies nothing before its epoch is committed there. Refused while
    /// the copies differ.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn arm(&mut self) -> Result<(), ClientError> {
        self.call(&Request::Arm {}, "arm", QUICK).await
    }

    /// Primary: protection has ended here. Backup: the guest's copy is gone, so the disk's may follow freely.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn disarm(&mut self) -> Result<(), ClientError> {
        self.call(&Request::Disarm {}, "disarm", SLOW).await
    }

    /// Primary, the guest suspended: closes the epoch. The service waits for no disk and no peer.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn barrier(&mut self, epoch: u64, within: Duration) -> Result<Closed, ClientError> {
        let (batch, records, bytes) = self.call(&Request::Barrier { epoch }, "close an epoch", within).await?;
        Ok(Closed { batch, records, bytes })
    }

    /// Backup: whether all of the epoch's writes are here, verified. Waits for them at most `wait`. To be true for every
    /// disk before the epoch is acknowledged.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn held(&mut self, epoch: u64, wait: Duration) -> Result<bool, ClientError> {
        let wait_ms = wait.as_millis() as u64;
        self.call(&Request::Held { epoch, wait_ms }, "wait for an epoch", wait + QUICK).await
    }

    /// Backup: the memory will not go back before this epoch, so the disk need not either. With the acknowledgement.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn commit(&mut self, epoch: u64) -> Result<(), ClientError> {
        self.call(&Request::Commit { epoch }, "commit an epoch", QUICK).await
    }

    /// Backup, before claiming: nothing more is taken in.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn freeze(&mut self) -> Result<(), ClientError> {
        self.call(&Request::Freeze {}, "freeze", QUICK).await
    }

    /// Backup: makes the disk exactly that of `epoch`: what is older is applied, what is newer dropped, and flushed. The
    /// disk is the source then, and still closed. `within` should allow for writing all that is held.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn activate(&mut self, epoch: u64, within: Duration) -> Result<(), ClientError> {
        self.call(&Request::Activate { epoch }, "activate", within).await
    }

    /// The owner of the guest: the disk may be used.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn open(&mut self) -> Result<(), ClientError> {
        self.call(&Request::Open {}, "open", SLOW).await
    }

    /// Makes `/dev/nbd<index>` the disk; `None` is the index that its service was given. Returns the path of the link to
    /// it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn attach(&mut self, index: Option<u32>) -> Result<PathBuf, ClientError> {
        self.call(&Request::Attach { index }, "attach", SLOW).await
    }

    /// Takes the block device away.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn detach(&mut self) -> Result<(), ClientError> {
        self.call(&Request::Detach {}, "detach", SLOW).await
    }

    /// Source: looks for the copy from now on, with a new session. `None` is as last time, or as its service was told.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn connect(&mut self, via: Option<&str>) -> Result<(), ClientError> {
        self.call(&Request::Connect { via: via.map(str::to_owned) }, "connect", SLOW).await
    }

    /// Source: keeps no session any more. Returns when it has ended.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn disconnect(&mut self) -> Result<(), ClientError> {
        self.call(&Request::Disconnect {}, "disconnect", SLOW).await
    }

    /// Source: begins to compare both copies; the end is the event [`DiskEvent::Verified`].
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn verify(&mut self) -> Result<(), ClientError> {
        self.call(&Request::Verify {}, "verify", QUICK).await
    }

    /// Source: ends comparing; the event says how far it came. `false` if nothing was being compared.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn abort_verify(&mut self) -> Result<bool, ClientError> {
        self.call(&Request::AbortVerify {}, "end comparing", QUICK).await
    }

    /// Makes a copy that is known to be good the source; any, with `force`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn promote(&mut self, force: bool) -> Result<(), ClientError> {
        self.call(&Request::Promote { force }, "promote", SLOW).await
    }

    /// Makes a closed disk a copy, which whoever connects overwrites.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn demote(&mut self) -> Result<(), ClientError> {
        self.call(&Request::Demote {}, "demote", SLOW).await
    }

    /// Gives the disk up as a mirrored one: a guest whose device-mapper device was moved onto it goes on with what that led to at first.
    ///
    /// # Errors
    /// [`ClientError`]; under protection, or open without such a device.
    pub async fn leave(&mut self) -> Result<(), ClientError> {
        self.call(&Request::Leave {}, "leave", SLOW).await
    }

    /// Ends the service of a disk that was left.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn quit(&mut self) -> Result<(), ClientError> {
        self.call(&Request::Quit {}, "quit", QUICK).await
    }

    /// The loser: nobody may use the disk. Requests of a guest that still has it fail.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn close(&mut self) -> Result<(), ClientError> {
        self.call(&Request::Close {}, "close", SLOW).await
    }
}

/// Follows what happens to a disk, for as long as its service runs and the receiver is kept.
///
/// # Errors
/// When it cannot be reached.
pub async fn events(run: &Path, disk: &str) -> Result<tokio::sync::mpsc::Receiver<DiskEvent>, ClientError> {
    let mut client = DiskClient::new(run, disk);
    let () = client.call(&Request::Events {}, "follow events", QUICK).await?;
    let (to, from) = tokio::sync::mpsc::channel(64);
    if let Some(stream) = client.stream {
        tokio::spawn(async move {
            let mut lines = stream.lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let Ok(event) = serde_json::from_str(&line) else { return };
                if to.send(event).await.is_err() {
                    return;
                }
            }
        });
    }
    Ok(from)
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    #[test]
    fn a_service_that_was_there_may_come_back_and_one_that_never_was_has_nothing_open() {
        let unreachable = |kind: ErrorKind| ClientError::Unreachable { disk: "d".into(), source: kind.into() };
        assert!(unreachable(ErrorKind::ConnectionRefused).may_come_back());
        assert!(unreachable(ErrorKind::UnexpectedEof).may_come_back());
        assert!(!unreachable(ErrorKind::NotFound).may_come_back());
        assert!(!ClientError::Refused { disk: "d".into(), why: "no".into() }.may_come_back());
    }
}
