//! The daemon's end of the control socket.

use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::types::{API_VERSION, ApiError, Envelope, ErrorCode, MAX_LINE, Reply, Request};

/// Who is asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// User id of the peer process.
    pub uid: u32,
    /// Its process id, if the kernel told.
    pub pid: Option<i32>,
}

/// Where an answer's lines go. Sending never blocks the daemon for a slow client longer than its queue.
#[derive(Clone, Debug)]
pub struct Answer {
    lines: mpsc::Sender<Reply>,
}

impl Answer {
    /// Sends a line; `false` once the client has gone.
    pub async fn send(&self, reply: Reply) -> bool {
        self.lines.send(reply).await.is_ok()
    }

    /// Ends when the client has gone.
    pub async fn client_gone(&self) {
        self.lines.closed().await;
    }
}

/// What the daemon does with requests.
pub trait Service: Send + Sync + 'static {
    /// Handles one request; `Ok` is sent as the result line.
    fn handle(
        self: Arc<Self>,
        request: Request,
        caller: Caller,
        answer: Answer,
    ) -> impl Future<Output = Result<serde_json::Value, ApiError>> + Send;
}

/// Listens at `path` (mode 0660) until dropped. An old socket file is replaced only if nobody answers there.
///
/// # Errors
/// When another daemon answers at `path`, or the socket cannot be made.
pub async fn listen(path: &Path) -> std::io::Result<UnixListener> {
    if UnixStream::connect(path).await.is_ok() {
        return Err(std::io::Error::new(
            std::io::ErrorKind::AddrInUse,
            format!("another remusd answers at {}", path.display()),
        ));
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// Serves requests for ever.
pub async fn serve<S: Service>(listener: UnixListener, service: Arc<S>) {
    accept_each(listener, "control socket", |stream| {
        let service = service.clone();
        async move {
            if let Err(error) = connection(stream, service).await {
                tracing::debug!("control connection: {error}");
            }
        }
    })
    .await;
}

/// Gives every connection a task of its own, for ever. `name` is the socket's, for the log.
pub async fn accept_each<H, F>(listener: UnixListener, name: &str, handle: H)
where
    H: Fn(UnixStream) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(handle(stream))),
            Err(error) => {
                // Out of descriptors, mostly: the next accept may do better, a tight loop would not.
                tracing::warn!("{name}: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection<S: Service>(stream: UnixStream, service: Arc<S>) -> std::io::Result<()> {
    let cred = stream.peer_cred()?;
    let caller = Caller { uid: cred.uid(), pid: cred.pid() };
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read).take(MAX_LINE as u64);
    let mut line = Vec::new();
    read.read_until(b'\n', &mut line).await?;
    let (lines, mut queue) = mpsc::channel(256);
    let answer = Answer { lines };

    let work = async {
        let result = match parse(&line) {
            Ok(request) => match allowed(&request, caller) {
                Ok(()) => service.handle(request, caller, answer.clone()).await,
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        let last = match result {
            Ok(value) => Reply::Result(value),
            Err(error) => Reply::Error(error),
        };
        answer.send(last).await;
        drop(answer);
    };
    let write_lines = async move {
        let mut gone = [0u8; 64];
        loop {
            tokio::select! {
                reply = queue.recv() => match reply {
                    Some(reply) => {
                        let mut bytes = serde_json::to_vec(&reply)?;
                        bytes.push(b'\n');
                        write.write_all(&bytes).await?;
                    }
                    None => return Ok::<(), std::io::Error>(()),
                },
                n = read.get_mut().read(&mut gone) => match n {
                    // Anything after the request is ignored; hanging up ends a foreground protection.
                    Ok(0) | Err(_) => return Ok(()),
                    Ok(_) => {}
                },
            }
        }
    };
    let ((), written) = tokio::join!(work, write_lines);
    written
}

fn parse(line: &[u8]) -> Result<Request, ApiError> {
    let invalid = |text: String| ApiError::new(ErrorCode::Invalid, text);
    if !line.ends_with(b"\n") {
        return Err(invalid(format!("A request is one line of at most {MAX_LINE} bytes")));
    }
    let envelope: Envelope =
        serde_json::from_slice(line).map_err(|e| invalid(format!("The request cannot be understood: {e}")))?;
    if envelope.version != API_VERSION {
        return Err(invalid(format!(
            "This daemon speaks version {API_VERSION} of the control API, the request has {}",
            envelope.version
        )));
    }
    Ok(envelope.request)
}

fn allowed(request: &Request, caller: Caller) -> Result<(), ApiError> {
    let reads = matches!(request, Request::Status | Request::Events { .. });
    if !reads {
        tracing::info!(uid = caller.uid, pid = caller.pid, ?request, "asked to act");
        if caller.uid != 0 {
            return Err(ApiError::new(ErrorCode::Denied, "Only root may do this"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::client::Call;

    struct Fake;

    impl Service for Fake {
        async fn handle(
            self: Arc<Self>,
            request: Request,
            _: Caller,
            answer: Answer,
        ) -> Result<serde_json::Value, ApiError> {
            match request {
                Request::Status => {
                    answer.send(Reply::Missed(3)).await;
                    Ok(serde_json::json!([1]))
                }
                _ => Err(ApiError::new(ErrorCode::NotFound, "no")),
            }
        }
    }

    async fn served() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = listen(&path).await.unwrap();
        tokio::spawn(serve(listener, Arc::new(Fake)));
        (dir, path)
    }

    #[tokio::test]
    async fn lines_then_one_result() {
        let (_dir, path) = served().await;
        let mut call = Call::start(&path, Request::Status).await.unwrap();
        assert_eq!(call.next().await.unwrap(), Some(Reply::Missed(3)));
        assert_eq!(call.next().await.unwrap(), Some(Reply::Result(serde_json::json!([1]))));
        assert_eq!(call.next().await.unwrap(), None);
    }

    #[tokio::test]
    async fn nonsense_gets_an_error_and_the_daemon_lives() {
        let (_dir, path) = served().await;
        for line in ["{}\n", "nonsense\n", "{\"version\":99,\"request\":\"status\"}\n", "\0\0\n"] {
            let mut stream = UnixStream::connect(&path).await.unwrap();
            stream.write_all(line.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            let Reply::Error(error) = serde_json::from_str(&answer).unwrap() else { panic!("{answer}") };
            assert_eq!(error.code, ErrorCode::Invalid, "{line}");
        }
        let mut call = Call::start(&path, Request::Status).await.unwrap();
        assert!(call.next().await.unwrap().is_some());
    }

    #[tokio::test]
    async fn two_daemons_do_not_share_a_socket() {
        let (_dir, path) = served().await;
        assert_eq!(listen(&path).await.unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
    }
}
