//! `remusd connect`: joins ssh's standard streams to the daemon of this host.
//!
//! A process of its own that knows nothing of the protocol: its end ends the stream and nothing else (DESIGN R9).

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

/// Where the daemon listens for links.
pub const LINK_SOCKET: &str = "/run/remus/link.sock";

/// Why the bridge could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// Nobody listens.
    #[error(
        "remusd is not running on {host} (nothing listens at {}): start it there with `systemctl start remusd`",
        .socket.display()
    )]
    NotRunning {
        /// This host's name.
        host: String,
        /// The socket that was tried.
        socket: PathBuf,
    },
    /// The socket is there but cannot be used.
    #[error("cannot reach remusd on {host} at {}: {source}", .socket.display())]
    Unreachable {
        /// This host's name.
        host: String,
        /// The socket that was tried.
        socket: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Copying failed.
    #[error("the link through {host} broke: {source}")]
    Broken {
        /// This host's name.
        host: String,
        /// The system's reason.
        source: io::Error,
    },
}

impl BridgeError {
    /// The process's exit code: 69 (`EX_UNAVAILABLE`) if the daemon cannot be reached, 74 (`EX_IOERR`) if copying failed.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotRunning { .. } | Self::Unreachable { .. } => 69,
            Self::Broken { .. } => 74,
        }
    }
}

/// Copies standard input to the daemon and the daemon's bytes to standard output until the daemon closes or standard output
/// does. Blocks. A thread may still sit in a read of standard input when it returns, so the caller should exit the process.
///
/// # Errors
/// [`BridgeError`]; print it on standard error, which ssh brings to the other side's operator.
pub fn run(socket: &Path) -> Result<(), BridgeError> {
    join(socket, io::stdin(), io::stdout())
}

fn join(socket: &Path, mut input: impl Read + Send + 'static, mut output: impl Write) -> Result<(), BridgeError> {
    let host = super::handshake::host_name();
    let mut from_daemon = UnixStream::connect(socket).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            BridgeError::NotRunning { host: host.clone(), socket: socket.to_owned() }
        }
        _ => BridgeError::Unreachable { host: host.clone(), socket: socket.to_owned(), source },
    })?;
    let broken = |source| BridgeError::Broken { host: host.clone(), source };
    let mut to_daemon = from_daemon.try_clone().map_err(broken)?;
    std::thread::spawn(move || {
        // However this ends, the daemon sees the end of the stream and decides what it means.
        let _ = copy(&mut input, &mut to_daemon);
        let _ = to_daemon.shutdown(Shutdown::Write);
    });
    copy(&mut from_daemon, &mut output).map_err(broken)
}

/// Copies with a large buffer and a flush after each read: heartbeats must not wait for a full buffer.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        to.write_all(&buffer[..read])?;
        to.flush()?;
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, thread};

    use super::*;

    #[test]
    fn says_that_the_daemon_is_not_running() {
        let directory = tempfile::tempdir().unwrap();
        let error = join(&directory.path().join("none"), io::empty(), io::sink()).unwrap_err();
        assert!(matches!(error, BridgeError::NotRunning { .. }));
        assert_eq!(error.exit_code(), 69);
        assert!(error.to_string().contains("systemctl start remusd"));
    }

    #[test]
    fn copies_both_ways_and_ends_with_the_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("link.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let daemon = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            stream.read_to_end(&mut request).unwrap();
            stream.write_all(&request).unwrap();
        });
        let mut output = Vec::new();
        join(&path, io::Cursor::new(b"ping".to_vec()), &mut output).unwrap();
        daemon.join().unwrap();
        assert_eq!(output, b"ping");
    }
}
