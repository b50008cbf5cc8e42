//! Ways to the peer's remusd. Each yields one byte stream; authentication and encryption are the transport's business.

use std::{io, path::PathBuf, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
    process::Command,
};

use super::{child::ChildGroup, error::LinkError, tls::Dial};

/// The command that joins ssh's standard streams to the peer's daemon.
pub const REMOTE_COMMAND: &str = "remusd connect";

/// The ssh used when none is named. BatchMode: no daemon can answer a prompt. ConnectTimeout: a host that is off must not
/// hold the operator for TCP's two minutes.
pub const DEFAULT_SSH: &str = "ssh -o BatchMode=yes -o ConnectTimeout=10";

/// A way to the peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// `exec SSH HOST remusd connect`, run by `sh`.
    Ssh {
        /// Host as ssh knows it.
        host: String,
        /// The ssh command with its options, as in `xl remus -s`; `None` is [`DEFAULT_SSH`].
        ssh: Option<String>,
    },
    /// A shell command whose standard streams are the link (`xl remus -s '' DOMAIN COMMAND`).
    Command(String),
    /// The link socket of a remusd on this host, or of a forwarding.
    Unix(PathBuf),
    /// TLS to a paired host.
    Tls(Dial),
}

impl std::fmt::Display for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ssh { host, .. } => f.write_str(host),
            Self::Command(command) => write!(f, "`{command}`"),
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tls(dial) => dial.fmt(f),
        }
    }
}

/// An open stream to the peer.
pub struct Connection {
    /// From the peer.
    pub reader: Box<dyn AsyncRead + Send + Sync + Unpin>,
    /// To the peer.
    pub writer: Box<dyn AsyncWrite + Send + Sync + Unpin>,
    /// The process that carries the stream; dropping it kills it.
    pub(super) child: Option<ChildGroup>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("child", &self.child).finish_non_exhaustive()
    }
}

impl Connection {
    /// A connection over any stream.
    pub fn new(stream: impl AsyncRead + AsyncWrite + Send + Sync + 'static) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        Self { reader: Box::new(reader), writer: Box::new(writer), child: None }
    }

    /// What the carrying process said last, if there is one; waits half a second for it to end.
    pub(super) async fn last_words(child: &mut Option<ChildGroup>) -> Option<String> {
        match child {
            Some(child) => Some(child.last_words(Duration::from_millis(500)).await),
            None => None,
        }
    }
}

impl Transport {
    /// The shell command of this transport, if it is one.
    ///
    /// # Errors
    /// If the host could be taken for an option.
    fn shell_command(&self) -> io::Result<Option<String>> {
        match self {
            Self::Ssh { host, ssh } => {
                if host.is_empty() || host.starts_with('-') {
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{host:?} is not a host name")));
                }
                let ssh = ssh.as_deref().unwrap_or(DEFAULT_SSH);
                Ok(Some(format!("exec {ssh} {} {REMOTE_COMMAND}", quote(host))))
            }
            Self::Command(command) => Ok(Some(command.clone())),
            Self::Unix(_) | Self::Tls(_) => Ok(None),
        }
    }

    /// Opens the stream. Does not wait for the peer to say anything.
    ///
    /// # Errors
    /// [`LinkError::Transport`] if the command cannot be started or the socket not be reached.
    pub async fn open(&self) -> Result<Connection, LinkError> {
        self.try_open().await.map_err(|source| LinkError::Transport { what: self.to_string(), source })
    }

    async fn try_open(&self) -> io::Result<Connection> {
        match self {
            Self::Unix(path) => return Ok(Connection::new(UnixStream::connect(path).await?)),
            Self::Tls(dial) => return Ok(dial.open().await?),
            Self::Ssh { .. } | Self::Command(_) => {}
        }
        let mut command = Command::new("sh");
        command.arg("-c").arg(self.shell_command()?.unwrap_or_default());
        let (child, stdin, stdout) = ChildGroup::spawn("transport", command)?;
        Ok(Connection { reader: Box::new(stdout), writer: Box::new(stdin), child: Some(child) })
    }
}

/// Quotes a word for sh.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ssh_runs_the_bridge_and_a_host_cannot_be_an_option_or_a_command() {
        let ssh = |host: &str, ssh: Option<&str>| {
            Transport::Ssh { host: host.into(), ssh: ssh.map(Into::into) }.shell_command()
        };
        assert_eq!(
            ssh("b", None).unwrap().unwrap(),
            "exec ssh -o BatchMode=yes -o ConnectTimeout=10 'b' remusd connect"
        );
        assert_eq!(
            ssh("b; reboot '", Some("ssh -p 2")).unwrap().unwrap(),
            r"exec ssh -p 2 'b; reboot '\''' remusd connect"
        );
        assert!(ssh("-oProxyCommand=x", None).is_err());
    }
}
