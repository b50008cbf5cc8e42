//! QMP, QEMU's control protocol: JSON objects on a Unix socket (qemu/docs/interop/qmp-spec).

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout_at;

use crate::ids::DomId;

/// Longest line accepted: answers of the commands we use have some hundred bytes.
const LINE_MAX: usize = 1 << 20;

/// A failed conversation with a device model.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// No device model listens.
    #[error("cannot reach the device model of domain {domid} at {path}: {cause}; is its QEMU running?")]
    Connect {
        /// The domain.
        domid: DomId,
        /// The socket.
        path: PathBuf,
        /// What the system said.
        cause: String,
    },
    /// The device model did not answer in time.
    #[error("the device model of domain {domid} did not answer {command} within {waited:?}; its disks may hang")]
    Timeout {
        /// The domain.
        domid: DomId,
        /// What was asked.
        command: String,
        /// How long it had.
        waited: Duration,
    },
    /// The device model refused.
    #[error("the device model of domain {domid} refused {command}: {cause}")]
    Refused {
        /// The domain.
        domid: DomId,
        /// What was asked.
        command: String,
        /// What it said.
        cause: String,
    },
    /// The connection broke, or carried something else than QMP.
    #[error("lost the device model of domain {domid} during {command}: {cause}")]
    Broken {
        /// The domain.
        domid: DomId,
        /// What was asked.
        command: String,
        /// What was wrong.
        cause: String,
    },
    /// What is needed for the conversation cannot be had here.
    #[error("cannot save the device model of domain {domid}: {cause}")]
    Local {
        /// The domain.
        domid: DomId,
        /// What was wrong.
        cause: String,
    },
}

/// Where libxl has a domain's device model listen. Serves one client at a time; libxl itself connects only for moments.
#[must_use]
pub fn socket_path(domid: DomId) -> PathBuf {
    format!("/var/run/xen/qmp-libxl-{domid}").into()
}

/// A connection. After an error other than [`QmpError::Refused`] it is out of step: connect anew.
pub struct Qmp {
    domid: DomId,
    stream: BufReader<UnixStream>,
    line: Vec<u8>,
}

impl Qmp {
    /// Connects and leaves the greeting behind.
    ///
    /// # Errors
    /// [`QmpError`]; `Timeout` also when another client holds the socket.
    pub async fn connect(domid: DomId, path: &Path, deadline: Instant) -> Result<Self, QmpError> {
        let begun = Instant::now();
        let connected = timeout_at(deadline.into(), UnixStream::connect(path)).await;
        let stream = match connected {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                return Err(QmpError::Connect { domid, path: path.to_owned(), cause: error.to_string() });
            }
            Err(_) => return Err(timed_out(domid, "connect", begun)),
        };
        let mut qmp = Self { domid, stream: BufReader::new(stream), line: Vec::new() };
        let greeting = timeout_at(deadline.into(), qmp.read("the greeting")).await;
        let greeting = greeting.map_err(|_| timed_out(domid, "the greeting", begun))??;
        if greeting.get("QMP").is_none() {
            return Err(qmp.broken("the greeting", &greeting.to_string()));
        }
        qmp.execute("qmp_capabilities", &json!({}), deadline).await?;
        Ok(qmp)
    }

    /// Runs a command; events that arrive meanwhile are skipped.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn execute(&mut self, command: &str, arguments: &Value, deadline: Instant) -> Result<Value, QmpError> {
        self.run(command, arguments, None, deadline).await
    }

    /// Runs a command that takes a descriptor, such as `add-fd`.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn execute_with_fd(
        &mut self,
        command: &str,
        arguments: &Value,
        fd: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<Value, QmpError> {
        self.run(command, arguments, Some(fd), deadline).await
    }

    async fn run(
        &mut self,
        command: &str,
        arguments: &Value,
        fd: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<Value, QmpError> {
        let begun = Instant::now();
        let talk = self.talk(command, arguments, fd);
        match timeout_at(deadline.into(), talk).await {
            Ok(outcome) => outcome,
            Err(_) => Err(timed_out(self.domid, command, begun)),
        }
    }

    async fn talk(&mut self, command: &str, arguments: &Value, fd: Option<BorrowedFd<'_>>) -> Result<Value, QmpError> {
        let mut request = json!({"execute": command, "arguments": arguments}).to_string();
        request.push('\n');
        let mut rest = request.as_bytes();
        if let Some(fd) = fd {
            let sent = send_with_fd(self.stream.get_ref(), rest, fd).await;
            let sent = sent.map_err(|error| self.broken(command, &error.to_string()))?;
            rest = rest.get(sent..).unwrap_or_default();
        }
        let written = self.stream.get_mut().write_all(rest).await;
        written.map_err(|error| self.broken(command, &error.to_string()))?;
        loop {
            let mut answer = self.read(command).await?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let text = error.get("desc").and_then(Value::as_str);
                return Err(QmpError::Refused {
                    domid: self.domid,
                    command: command.into(),
                    cause: text.map_or_else(|| error.to_string(), str::to_owned),
                });
            }
            if answer.get("event").is_none() {
                return Err(self.broken(command, &answer.to_string()));
            }
        }
    }

    async fn read(&mut self, command: &str) -> Result<Value, QmpError> {
        self.line.clear();
        loop {
            let available = match self.stream.fill_buf().await {
                Ok(available) => available,
                Err(error) => return Err(self.broken(command, &error.to_string())),
            };
            if available.is_empty() {
                return Err(self.broken(command, "the connection was closed"));
            }
            let end = available.iter().position(|byte| *byte == b'\n');
            let used = end.map_or(available.len(), |end| end + 1);
            self.line.extend_from_slice(&available[..used]);
            self.stream.consume(used);
            if self.line.len() > LINE_MAX {
                return Err(self.broken(command, "an endless line"));
            }
            if end.is_some() {
                break;
            }
        }
        serde_json::from_slice(&self.line).map_err(|error| self.broken(command, &error.to_string()))
    }

    fn broken(&self, command: &str, cause: &str) -> QmpError {
        QmpError::Broken { domid: self.domid, command: command.into(), cause: cause.into() }
    }
}

fn timed_out(domid: DomId, command: &str, begun: Instant) -> QmpError {
    QmpError::Timeout { domid, command: command.into(), waited: begun.elapsed() }
}

async fn send_with_fd(stream: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let fds = [fd.as_raw_fd()];
    stream
        .async_io(Interest::WRITABLE, || {
            let message = [ControlMessage::ScmRights(&fds)];
            let sent =
                sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], &message, MsgFlags::MSG_NOSIGNAL, None);
            sent.map_err(io::Error::from)
        })
        .await
}
