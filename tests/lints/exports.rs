//! Every export of the C ABI is documented, is nothing but one call of a guard, and looks at each of its pointers before it follows
//! them. The sources are parsed, so a body that only looks right is not taken for one.

use std::collections::BTreeMap;
use syn::visit::Visit;

/// Calls that catch panics and turn errors into a status or a default.
const GUARDS: [&str; 2] = ["guard", "status"];
/// Functions whose first argument is a pointer that they refuse when it is null, or know how to do without.
const CHECKS: [&str; 6] = ["str_arg", "in_arg", "out_arg", "optional_out_arg", "array_arg", "bytes_arg"];
/// Tables of handles, and their methods that look an argument up and never follow it.
const TABLES: [&str; 4] = ["engines", "connections", "notifications", "lists"];
const LOOKUPS: [&str; 5] = ["get", "get_if_mine", "get_if_mine_or_ending", "remove", "end"];

/// The functions of the sources of src/ffi.
struct Abi {
    functions: BTreeMap<String, syn::ItemFn>,
}

impl Abi {
    /// Of texts, by the name of their file.
    fn parse(sources: &[(String, String)]) -> Abi {
        let mut functions = BTreeMap::new();
        for (file, text) in sources {
            let parsed = syn::parse_file(text).unwrap_or_else(|e| panic!("{file}: {e}"));
            for item in parsed.items {
                if let syn::Item::Fn(function) = item {
                    let name = function.sig.ident.to_string();
                    assert!(functions.insert(name.clone(), function).is_none(), "{file}: two functions are called {name}");
                }
            }
        }
        Abi { functions }
    }

    /// Of every file in src/ffi.
    fn of_the_library() -> Abi {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/ffi");
        let mut sources = Vec::new();
        for entry in std::fs::read_dir(folder).expect(folder) {
            let path = entry.expect(folder).path();
            assert_eq!(path.extension(), Some("rs".as_ref()), "{}: not a source", path.display());
            sources.push((path.display().to_string(), std::fs::read_to_string(&path).expect("source")));
        }
        Abi::parse(&sources)
    }

    fn exports(&self) -> Vec<&str> {
        let exported = |f: &syn::ItemFn| f.attrs.iter().any(|a| a.path().is_ident("no_mangle"));
        self.functions.iter().filter(|(_, f)| exported(f)).map(|(name, _)| name.as_str()).collect()
    }

    /// The faults of the exports.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        for name in self.exports() {
            let function = &self.functions[name];
            let doc = doc_of(function);
            if !name.starts_with("uccl_engine_") {
                faults.push(format!("{name}: no prefix"));
            }
            if doc.trim().is_empty() {
                faults.push(format!("{name}: no doc comment"));
            } else if !doc.contains("Threads:") {
                faults.push(format!("{name}: does not say from which threads it may be called"));
            }
            if !matches!(function.sig.output, syn::ReturnType::Default) && !doc.contains("@return") {
                faults.push(format!("{name}: does not say what it returns"));
            }
            if !self.guarded(function) {
                faults.push(format!("{name}: is not one call of a guard"));
            }
            for (index, parameter) in parameters(function).iter().enumerate() {
                if !doc.contains(&format!("@param {} ", parameter.name)) {
                    faults.push(format!("{name}: does not document {}", parameter.name));
                }
                if parameter.pointer && !self.looks_at(function, index) {
                    faults.push(format!("{name}: no null test of {}", parameter.name));
                }
            }
        }
        faults
    }

    /// Whether the body is one call of a guard, or of a function here whose body is.
    fn guarded(&self, function: &syn::ItemFn) -> bool {
        let [syn::Stmt::Expr(body, None)] = &function.block.stmts[..] else { return false };
        let body = match body {
            syn::Expr::Unsafe(block) => match &block.block.stmts[..] {
                [syn::Stmt::Expr(inner, None)] => inner,
                _ => return false,
            },
            other => other,
        };
        let syn::Expr::Call(call) = body else { return false };
        let Some(callee) = name_of(&call.func) else { return false };
        if GUARDS.contains(&callee.as_str()) {
            // The work is in a closure, so that the guard is there before it begins.
            return matches!(call.args.last(), Some(syn::Expr::Closure(_)));
        }
        // Arguments are worked out before the guard of the callee: nothing but names.
        call.args.iter().all(|a| matches!(a, syn::Expr::Path(_))) && self.functions.get(&callee).is_some_and(|f| self.guarded(f))
    }

    /// Whether the function, or one that it hands the parameter to, gives it to a check.
    fn looks_at(&self, function: &syn::ItemFn, index: usize) -> bool {
        let name = parameters(function)[index].name.clone();
        let mut search = Search { abi: self, name, found: false };
        search.visit_block(&function.block);
        search.found
    }
}

struct Parameter {
    name: String,
    pointer: bool,
}

fn parameters(function: &syn::ItemFn) -> Vec<Parameter> {
    let parameter = |input: &syn::FnArg| match input {
        syn::FnArg::Typed(typed) => {
            let syn::Pat::Ident(name) = &*typed.pat else { panic!("{}: a parameter without a name", function.sig.ident) };
            Parameter { name: name.ident.to_string(), pointer: matches!(*typed.ty, syn::Type::Ptr(_)) }
        }
        syn::FnArg::Receiver(_) => panic!("{}: a method", function.sig.ident),
    };
    function.sig.inputs.iter().map(parameter).collect()
}

fn doc_of(function: &syn::ItemFn) -> String {
    let mut doc = String::new();
    for attribute in &function.attrs {
        if let syn::Meta::NameValue(syn::MetaNameValue { path, value: syn::Expr::Lit(text), .. }) = &attribute.meta {
            if let (true, syn::Lit::Str(text)) = (path.is_ident("doc"), &text.lit) {
                doc += &text.value();
                doc.push('\n');
            }
        }
    }
    doc
}

/// The last word of a path.
fn name_of(expression: &syn::Expr) -> Option<String> {
    match expression {
        syn::Expr::Path(path) => Some(path.path.segments.last()?.ident.to_string()),
        _ => None,
    }
}

/// Looks for a check of a parameter.
struct Search<'a> {
    abi: &'a Abi,
    name: String,
    found: bool,
}

impl Search<'_> {
    /// Whether the expression is the parameter, perhaps as a pointer to another type.
    fn is_it(&self, expression: &syn::Expr) -> bool {
        match expression {
            syn::Expr::MethodCall(call) => call.method == "cast" && self.is_it(&call.receiver),
            other => name_of(other).as_ref() == Some(&self.name),
        }
    }
}

impl<'a> Visit<'a> for Search<'_> {
    fn visit_expr_call(&mut self, call: &'a syn::ExprCall) {
        if let Some(callee) = name_of(&call.func) {
            for (index, argument) in call.args.iter().enumerate() {
                if self.is_it(argument) {
                    let checked = index == 0 && CHECKS.contains(&callee.as_str());
                    let handed_on = || self.abi.functions.get(&callee).is_some_and(|f| self.abi.looks_at(f, index));
                    self.found |= checked || (!CHECKS.contains(&callee.as_str()) && handed_on());
                }
            }
        }
        syn::visit::visit_expr_call(self, call);
    }

    /// An address as a number is looked up among the registered regions, and not followed here.
    fn visit_expr_cast(&mut self, cast: &'a syn::ExprCast) {
        let number = matches!(&*cast.ty, syn::Type::Path(to) if to.path.is_ident("usize"));
        self.found |= number && self.is_it(&cast.expr);
        syn::visit::visit_expr_cast(self, cast);
    }

    fn visit_expr_method_call(&mut self, call: &'a syn::ExprMethodCall) {
        let method = call.method.to_string();
        if method == "is_null" && self.is_it(&call.receiver) {
            self.found = true;
        }
        if let (syn::Expr::Call(table), Some(argument)) = (&*call.receiver, call.args.first()) {
            let of_a_table = name_of(&table.func).is_some_and(|t| TABLES.contains(&t.as_str()));
            self.found |= of_a_table && LOOKUPS.contains(&method.as_str()) && self.is_it(argument);
        }
        syn::visit::visit_expr_method_call(self, call);
    }
}

#[test]
fn every_export_is_guarded_documented_and_looks_at_its_pointers() {
    let abi = Abi::of_the_library();
    assert!(abi.exports().len() >= 45, "only {} exports found", abi.exports().len());
    let faults = abi.faults();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// A source with one export that is as it should be, for breaking.
const GOOD: &str = r#"
/// Does it.
///
/// @param conn  The connection.
/// @param out   The result.
/// @return A status.
///
/// Threads: any.
#[no_mangle]
pub unsafe extern "C" fn uccl_engine_it(conn: *mut uccl_conn_t, out: *mut u64) -> c_int {
    status(|| {
        // SAFETY: the caller passes a writable number or null.
        *unsafe { out_arg(out, "out")? } = connections().get(conn.cast())?.it();
        Ok(UCCL_OK)
    })
}
"#;

fn faults_of(text: &str) -> Vec<String> {
    Abi::parse(&[("planted.rs".to_owned(), text.to_owned())]).faults()
}

#[test]
fn a_missing_guard_doc_comment_or_null_test_is_noticed() {
    assert_eq!(faults_of(GOOD), [""; 0]);
    let body = &GOOD[GOOD.find("    status(").unwrap()..GOOD.rfind('}').unwrap()];
    let with_body = |new: &str| GOOD.replace(body, new);
    let lookup = "*unsafe { out_arg(out, \"out\")? } = connections().get(conn.cast())?.it();";
    for (what, text, fault) in [
        ("a comment only", with_body("    // SAFETY: all is well.\n    conn.it(out)\n"), "not one call of a guard"),
        ("unsafe only", with_body("    // SAFETY: all is well.\n    unsafe { *out = 1 };\n    0\n"), "not one call of a guard"),
        ("work before", GOOD.replace("    status(|| {", "    let first = *out;\n    status(|| {"), "not one call of a guard"),
        ("work after", GOOD.replace("    })\n}", "    });\n    *out as c_int\n}"), "not one call of a guard"),
        ("a result that is used", GOOD.replace("    })\n}", "    }) + *out as c_int\n}"), "not one call of a guard"),
        ("work in arguments", with_body("    status(it(conn, out))\n"), "not one call of a guard"),
        (
            "a helper without a guard",
            with_body("    help(conn, out)\n") + "fn help(a: *mut A, b: *mut u64) -> c_int { 0 }",
            "guard",
        ),
        ("a comment with the word", with_body("    // status(|| Ok(0))\n    it(conn, out)\n"), "not one call of a guard"),
        ("no output check", GOOD.replace("out_arg(out, \"out\")?", "&mut *out"), "no null test of out"),
        ("a check of something else", GOOD.replace("out_arg(out, \"out\")", "out_arg(other, \"out\")"), "no null test of out"),
        ("a check in words", GOOD.replace(lookup, "// out_arg(out) connections().get(conn)\n"), "no null test of conn"),
        ("a handle that is followed", GOOD.replace("connections().get(conn.cast())?", "(*conn)"), "no null test of conn"),
        ("no doc comment", GOOD[GOOD.find("#[no").unwrap()..].to_owned(), "no doc comment"),
        ("no word on threads", GOOD.replace("Threads: any.", "Any."), "from which threads"),
        ("no word on the result", GOOD.replace("@return", "Returns"), "does not say what it returns"),
        ("no word on a parameter", GOOD.replace("@param out ", "@param what "), "does not document out"),
        ("another prefix", GOOD.replace("uccl_engine_it", "it"), "no prefix"),
    ] {
        let faults = faults_of(&text);
        assert!(faults.iter().any(|f| f.contains(fault)), "{what}: {faults:?}\n{text}");
    }
    // A helper with a guard that checks is as good as the function itself.
    let helper = with_body("    // SAFETY: forwarded.\n    unsafe { help(out, conn) }\n")
        + "unsafe fn help(first: *mut u64, second: *mut uccl_conn_t) -> c_int { status(|| { out_arg(first, \"\")?; \
           connections().get(second.cast())?; Ok(0) }) }";
    assert_eq!(faults_of(&helper), [""; 0]);
    assert!(faults_of(&helper.replace("out_arg(first", "out_arg(third")).iter().any(|f| f.contains("no null test of out")));
}

#[test]
fn every_status_is_in_the_header() {
    let header = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/include/uccl_engine.h")).expect("header");
    for kind in uccl_p2p::status::ErrorKind::ALL {
        assert!(
            header.lines().any(|l| l.starts_with("#define UCCL_ERR_") && l.ends_with(&format!(" {}", kind.code()))),
            "{kind:?}"
        );
    }
    for name in Abi::of_the_library().exports() {
        assert!(header.contains(&format!("{name}(")), "{name} is not in the header");
    }
}
