//! The daemon's end of the control socket.

use std::collections::HashMap;
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use super::access::Access;
use super::types::{ApiError, Caller, DESCRIPTION, ErrorCode, INTERFACE, MAX_MESSAGE, Reply, Request};
use super::wire::{Asked, Call, Messages, Refused, ServiceError, encode};
use crate::ops::Backoff;

/// Connections of one user but root at a time.
const PER_USER: usize = 32;

/// Messages of an answer that wait for a client to take them; then whoever makes them waits.
const QUEUED: usize = 256;

/// Where an answer goes. Sending waits for a slow client, so nothing that others wait for does it.
#[derive(Clone, Debug)]
pub struct Answer {
    replies: mpsc::Sender<Reply>,
    /// Whether the client takes more than the last reply.
    more: bool,
}

impl Answer {
    /// Sends a reply that is not the last, if the client takes such; `false` once it has gone.
    pub async fn send(&self, reply: Reply) -> bool {
        if self.more { self.replies.send(reply).await.is_ok() } else { !self.replies.is_closed() }
    }

    /// Whether the client takes more than the last reply.
    #[must_use]
    pub fn takes_more(&self) -> bool {
        self.more
    }

    /// Ends when the client has gone.
    pub async fn client_gone(&self) {
        self.replies.closed().await;
    }
}

/// What the daemon does with requests.
pub trait Service: Send + Sync + 'static {
    /// Handles one request; `Ok`, an object, is the last reply's parameters.
    fn handle(
        self: Arc<Self>,
        request: Request,
        caller: Caller,
        answer: Answer,
    ) -> impl Future<Output = Result<Value, ApiError>> + Send;
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

/// What serves the control socket.
#[derive(Clone, Debug, Default)]
pub struct Server {
    access: Arc<RwLock<Access>>,
    /// Acting requests under way, so that the daemon's end lets their last replies out.
    acting: TaskTracker,
    users: Arc<Mutex<HashMap<u32, usize>>>,
}

/// One of a user's connections, counted.
struct Counted {
    users: Arc<Mutex<HashMap<u32, usize>>>,
    uid: u32,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = users.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                users.remove(&self.uid);
            }
        }
    }
}

impl Server {
    /// With a rule about who may act.
    #[must_use]
    pub fn new(access: Access) -> Self {
        Self { access: Arc::new(RwLock::new(access)), ..Self::default() }
    }

    /// Another rule, for every request from now on.
    pub fn set_access(&self, access: Access) {
        *self.access.write().unwrap_or_else(PoisonError::into_inner) = access;
    }

    /// Serves requests for ever.
    pub async fn serve<S: Service>(self, listener: UnixListener, service: Arc<S>) {
        accept_each(listener, "control socket", |stream| {
            let (service, server) = (service.clone(), self.clone());
            async move {
                if let Err(error) = server.connection(stream, service).await {
                    tracing::debug!("control connection: {error}");
                }
            }
        })
        .await;
    }

    /// Waits until the answers to acting requests are on their way, but not longer than this.
    pub async fn flush(&self, patience: Duration) {
        self.acting.close();
        let _ = tokio::time::timeout(patience, self.acting.wait()).await;
    }

    /// `None` when the user has too many already.
    fn count(&self, uid: u32) -> Option<Counted> {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        let count = users.entry(uid).or_default();
        if uid != 0 && *count >= PER_USER {
            return None;
        }
        *count += 1;
        Some(Counted { users: self.users.clone(), uid })
    }

    async fn connection<S: Service>(&self, stream: UnixStream, service: Arc<S>) -> std::io::Result<()> {
        let cred = stream.peer_cred()?;
        let caller = Caller { uid: cred.uid(), gid: cred.gid(), pid: cred.pid() };
        let (read, mut write) = stream.into_split();
        let Some(_counted) = self.count(caller.uid) else {
            let text = format!("User {} has {PER_USER} connections open already", caller.uid);
            return write.write_all(&encode(&Reply::Error(ApiError::new(ErrorCode::Denied, text)).message())).await;
        };
        let mut messages = Messages::new(read, MAX_MESSAGE);
        loop {
            let message = match messages.next().await {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(()),
                Err(_) => {
                    let text = format!("A message is at most {MAX_MESSAGE} bytes long");
                    return write
                        .write_all(&encode(&Reply::Error(ApiError::new(ErrorCode::Invalid, text)).message()))
                        .await;
                }
            };
            let call = match Call::parse(&message) {
                Ok(call) => call,
                // What follows cannot be trusted to begin where it seems to.
                Err(error) => return write.write_all(&encode(&Reply::Error(error).message())).await,
            };
            let (more, oneway) = (call.more, call.oneway);
            match call.asked() {
                Ok(Asked::Ours(request)) => {
                    let _acting = request.acts().then(|| self.acting.token());
                    let call = Underway { request: *request, caller, more, oneway };
                    if !self.answer(call, &service, &mut messages, &mut write).await? {
                        return Ok(());
                    }
                }
                other if oneway => drop(other),
                Ok(Asked::Info) => write.write_all(&encode(&info())).await?,
                Ok(Asked::Description(name)) => write.write_all(&encode(&description(&name))).await?,
                Err(Refused::Service(error)) => write.write_all(&encode(&error.message())).await?,
                Err(Refused::Api(error)) => write.write_all(&encode(&Reply::Error(error).message())).await?,
            }
        }
    }

    /// Runs one request and sends its replies. `false` when the client has gone.
    async fn answer<S: Service>(
        &self,
        call: Underway,
        service: &Arc<S>,
        messages: &mut Messages<tokio::net::unix::OwnedReadHalf>,
        write: &mut OwnedWriteHalf,
    ) -> std::io::Result<bool> {
        let Underway { request, caller, more, oneway } = call;
        let (replies, mut queue) = mpsc::channel(QUEUED);
        let answer = Answer { replies: replies.clone(), more: more && !oneway };
        let work = async move {
            // Copied out: nobody's lock is held while the user database is asked.
            let access = *self.access.read().unwrap_or_else(PoisonError::into_inner);
            let result = match access.check(&request, caller).await {
                Ok(()) => service.clone().handle(request, caller, answer).await,
                Err(error) => Err(error),
            };
            let last = match result {
                Ok(value) => Reply::Result(value),
                Err(error) => Reply::Error(error),
            };
            let _ = replies.send(last).await;
        };
        // Moved in, so that the queue is closed when the client has gone, which is how the work learns of it.
        let send = async move {
            loop {
                tokio::select! {
                    reply = queue.recv() => match reply {
                        Some(_) if oneway => {}
                        Some(reply) => write.write_all(&encode(&reply.message())).await?,
                        None => return Ok(true),
                    },
                    () = messages.gone() => return Ok(false),
                }
            }
        };
        let ((), sent) = tokio::join!(work, send);
        sent
    }
}

/// A call that is being answered.
struct Underway {
    request: Request,
    caller: Caller,
    more: bool,
    oneway: bool,
}

fn info() -> Value {
    json!({ "parameters": {
        "vendor": "remusd",
        "product": "remusd",
        "version": env!("CARGO_PKG_VERSION"),
        "url": env!("CARGO_PKG_REPOSITORY"),
        "interfaces": ["org.varlink.service", INTERFACE],
    }})
}

fn description(name: &str) -> Value {
    match name {
        INTERFACE => json!({ "parameters": { "description": DESCRIPTION } }),
        "org.varlink.service" => json!({ "parameters": { "description": VARLINK_SERVICE } }),
        other => ServiceError::interface_not_found(other).message(),
    }
}

/// The part of varlink.org/Service that is served here.
const VARLINK_SERVICE: &str = include_str!("org.varlink.service.varlink");

/// Gives every connection a task of its own, for ever. `name` is the socket's, for the log.
pub async fn accept_each<H, F>(listener: UnixListener, name: &str, handle: H)
where
    H: Fn(UnixStream) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let patience = || Backoff::endless(Duration::from_millis(10), Duration::from_secs(1)).expect("0 < first <= cap");
    let mut backoff = patience();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                backoff.reset();
                drop(tokio::spawn(handle(stream)));
            }
            Err(error) => {
                // Out of descriptors, mostly: the next accept may do better, a tight loop would not.
                tracing::warn!("{name}: {error}");
                let _ = backoff.wait().await;
            }
        }
    }
}

#[cfg(test)]
mod tests;
