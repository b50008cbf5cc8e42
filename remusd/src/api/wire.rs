//! The varlink wire format (varlink.org/Method-Call): JSON objects, each ended by a zero byte.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::types::{ApiError, ErrorCode, INTERFACE, Reply, Request};

/// A method call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// Interface and method.
    pub method: String,
    /// Its parameters.
    #[serde(default)]
    pub parameters: Option<serde_json::Map<String, Value>>,
    /// Any number of replies may come.
    #[serde(default)]
    pub more: bool,
    /// No reply is wanted.
    #[serde(default)]
    pub oneway: bool,
    /// Another protocol is wanted. Always refused.
    #[serde(default)]
    pub upgrade: bool,
}

/// What a call asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Asked {
    /// A method of ours.
    Ours(Box<Request>),
    /// `org.varlink.service.GetInfo`.
    Info,
    /// `org.varlink.service.GetInterfaceDescription`.
    Description(String),
}

/// An error reply that is not [`ApiError`]: varlink's own.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceError {
    name: &'static str,
    parameters: Value,
}

impl ServiceError {
    /// The interface's name is not known here.
    #[must_use]
    pub fn interface_not_found(interface: &str) -> Self {
        Self { name: "InterfaceNotFound", parameters: json!({ "interface": interface }) }
    }

    /// The method makes sense only with `more`.
    #[must_use]
    pub fn expected_more() -> Self {
        Self { name: "ExpectedMore", parameters: json!({}) }
    }

    /// As a message.
    #[must_use]
    pub fn message(&self) -> Value {
        json!({ "error": format!("org.varlink.service.{}", self.name), "parameters": self.parameters })
    }
}

/// Why a call is not a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Refused {
    /// In varlink's words.
    Service(ServiceError),
    /// In ours.
    Api(ApiError),
}

fn invalid(text: impl Into<String>) -> Refused {
    Refused::Api(ApiError::new(ErrorCode::Invalid, text))
}

impl Call {
    /// The call that asks for this.
    ///
    /// # Panics
    /// Never: every [`Request`] is an object of one member.
    #[must_use]
    pub fn of(request: &Request) -> Self {
        let Ok(Value::Object(object)) = serde_json::to_value(request) else { unreachable!("variants with fields") };
        let (name, parameters) = object.into_iter().next().unwrap_or_default();
        let Value::Object(parameters) = parameters else { unreachable!("variants with fields") };
        Self {
            method: format!("{INTERFACE}.{name}"),
            parameters: Some(parameters),
            more: true,
            oneway: false,
            upgrade: false,
        }
    }

    /// Reads a message without its zero byte.
    ///
    /// # Errors
    /// `Invalid`, with what is wrong.
    pub fn parse(message: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(message)
            .map_err(|e| ApiError::new(ErrorCode::Invalid, format!("The message is no varlink call: {e}")))
    }

    /// What it asks for.
    ///
    /// # Errors
    /// [`Refused`] for what is not in the interface.
    pub fn asked(self) -> Result<Asked, Refused> {
        if self.upgrade {
            return Err(invalid("upgrade: there is no other protocol on this socket"));
        }
        let Some((interface, name)) = self.method.rsplit_once('.') else {
            return Err(Refused::Service(ServiceError::interface_not_found(&self.method)));
        };
        let parameters = without_nulls(self.parameters.unwrap_or_default());
        match (interface, name) {
            ("org.varlink.service", "GetInfo") => Ok(Asked::Info),
            ("org.varlink.service", "GetInterfaceDescription") => match parameters.get("interface") {
                Some(Value::String(interface)) => Ok(Asked::Description(interface.clone())),
                _ => Err(Refused::Service(ServiceError {
                    name: "InvalidParameter",
                    parameters: json!({ "parameter": "interface" }),
                })),
            },
            (INTERFACE, name) => {
                let request = Value::Object([(name.to_owned(), Value::Object(parameters))].into_iter().collect());
                match serde_json::from_value::<Request>(request) {
                    Ok(request) if request.needs_more() && !self.more => {
                        Err(Refused::Service(ServiceError::expected_more()))
                    }
                    Ok(request) => Ok(Asked::Ours(Box::new(request))),
                    Err(error) if error.to_string().starts_with("unknown variant") => {
                        Err(Refused::Service(not_found(&self.method)))
                    }
                    Err(error) => Err(invalid(format!("{name}: {error}"))),
                }
            }
            ("org.varlink.service", _) => Err(Refused::Service(not_found(&self.method))),
            (interface, _) => Err(Refused::Service(ServiceError::interface_not_found(interface))),
        }
    }
}

/// In varlink an optional member may be null as well as absent.
fn without_nulls(object: serde_json::Map<String, Value>) -> serde_json::Map<String, Value> {
    let members = object.into_iter().filter(|(_, value)| !value.is_null());
    let inner = |value| match value {
        Value::Object(object) => Value::Object(without_nulls(object)),
        other => other,
    };
    members.map(|(key, value)| (key, inner(value))).collect()
}

fn not_found(method: &str) -> ServiceError {
    ServiceError { name: "MethodNotFound", parameters: json!({ "method": method }) }
}

/// The name of an error of ours.
fn error_name(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::Invalid => "Invalid",
        ErrorCode::Denied => "Denied",
        ErrorCode::NotFound => "NotFound",
        ErrorCode::Conflict => "Conflict",
        ErrorCode::Unsupported => "Unsupported",
        ErrorCode::Peer => "Peer",
        ErrorCode::Cancelled => "Cancelled",
        ErrorCode::Failed => "Failed",
    }
}

const CODES: [ErrorCode; 8] = [
    ErrorCode::Invalid,
    ErrorCode::Denied,
    ErrorCode::NotFound,
    ErrorCode::Conflict,
    ErrorCode::Unsupported,
    ErrorCode::Peer,
    ErrorCode::Cancelled,
    ErrorCode::Failed,
];

impl Reply {
    /// As a message.
    #[must_use]
    pub fn message(&self) -> Value {
        match self {
            Self::Result(value) => json!({ "parameters": value }),
            Self::Error(error) => json!({
                "error": format!("{INTERFACE}.{}", error_name(error.code)),
                "parameters": { "message": error.message },
            }),
            other => json!({ "parameters": other, "continues": true }),
        }
    }

    /// Reads a message without its zero byte.
    ///
    /// # Errors
    /// A sentence, when it is not of this interface.
    pub fn parse(message: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Wire {
            #[serde(default)]
            parameters: Value,
            #[serde(default)]
            continues: bool,
            error: Option<String>,
        }
        let wire: Wire = serde_json::from_slice(message).map_err(|e| e.to_string())?;
        if let Some(name) = wire.error {
            let message = match wire.parameters.get("message") {
                Some(Value::String(text)) => text.clone(),
                _ => format!("{name} {}: is remusd of another version?", wire.parameters),
            };
            let ours = name.strip_prefix(INTERFACE).and_then(|n| n.strip_prefix('.'));
            let code = CODES.into_iter().find(|code| ours == Some(error_name(*code)));
            return Ok(Self::Error(ApiError::new(code.unwrap_or(ErrorCode::Failed), message)));
        }
        if wire.continues {
            return serde_json::from_value(wire.parameters).map_err(|e| e.to_string());
        }
        Ok(Self::Result(wire.parameters))
    }
}

/// A message with its zero byte.
#[must_use]
pub fn encode(value: &impl Serialize) -> Vec<u8> {
    // Of our own types, whose keys are strings: it cannot fail.
    let mut bytes = serde_json::to_vec(value).unwrap_or_default();
    bytes.push(0);
    bytes
}

/// The other side sent a message longer than the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong;

/// Cuts a byte stream into messages. Memory grows with what has come, never with what was announced.
#[derive(Debug)]
pub struct Messages<R> {
    read: R,
    buffer: Vec<u8>,
    limit: usize,
}

impl<R: AsyncRead + Unpin> Messages<R> {
    /// Nothing read yet; a message of more than `limit` bytes will be refused.
    pub fn new(read: R, limit: usize) -> Self {
        Self { read, buffer: Vec::new(), limit }
    }

    /// The next message without its zero byte; `None` at the end of the stream. Cancel-safe.
    ///
    /// # Errors
    /// [`TooLong`]; the stream is of no use then.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, TooLong> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.buffer[searched..].iter().position(|b| *b == 0) {
                let mut message: Vec<u8> = self.buffer.drain(..=searched + end).collect();
                message.pop();
                return Ok(Some(message));
            }
            searched = self.buffer.len();
            if searched > self.limit {
                return Err(TooLong);
            }
            if !self.fill().await {
                return Ok(None);
            }
        }
    }

    /// Ends when the other side has hung up, or sends more than can be kept. Cancel-safe; what comes meanwhile is kept.
    pub async fn gone(&mut self) {
        while self.buffer.len() <= self.limit && self.fill().await {}
    }

    async fn fill(&mut self) -> bool {
        self.buffer.reserve(4096);
        matches!(self.read.read_buf(&mut self.buffer).await, Ok(n) if n > 0)
    }
}
